"""Which head has which role: maps, their files and origin, presets, the Hub, and the files of other projects."""
