"""Which head has which role: maps, their files and origin, presets, the Hub, files of other projects."""
