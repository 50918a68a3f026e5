"""The pixel art of the demo world, as text: a letter is a paint, a dot is nothing.

A landmark is 12 pixels wide and stands on the ground with its last row. Paints are in `paint.py`; `c` and `C`
are the thing's own colour, light and dark.
"""

from __future__ import annotations

LANDMARKS = {
    "cottage": """
.....CC.....
....cccc....
...cCCCCc...
..cccccccc..
.cCCCCCCCCc.
cccccccccccc
.wwwwwwwwww.
.wwwwwwwwww.
.wddwwxxxww.
.wddwwxxxww.
.wddwwxxxww.
.wddwwwwwww.
.wddwwwwwww.
""",
    "house": """
..rrrrrrrr..
.rrrrrrrrrr.
rrrrrrrrrrrr
.cccccccccc.
.cxxxccxxxc.
.cxxxccxxxc.
.cxxxccxxxc.
.cccccccccc.
.CCCCCCCCCC.
.cccccccccc.
.cxxxccxxxc.
.cxxxccxxxc.
.cxxxccxxxc.
.cccccccccc.
.CCCCCCCCCC.
.cccccccccc.
.cccddcxxxc.
.cccddcxxxc.
.cccddccccc.
.cccddccccc.
.cccddccccc.
""",
    "tower": """
.....kcc....
.....kcccc..
.....kcccccc
.....kcccc..
.....kcc....
.....k......
.....k......
.ss.ssss.ss.
.ss.ssss.ss.
.ssssssssss.
.SSSSSSSSSS.
..ssssssss..
..sssxxsss..
..sssxxsss..
..sssxxsss..
..ssssssss..
..SccccccS..
..sccccccs..
..sccCCccs..
..sccccccs..
..sccccccs..
..ssccccss..
..sssccsss..
..SSssssSS..
..ssssssss..
..ssddddss..
..ssddddss..
..ssddddss..
..ssddddss..
""",
    "church": """
.....yy.....
....yyyy....
.....yy.....
.....yy.....
.....cc.....
.....cc.....
....ccCC....
....ccCC....
...cccCCC...
...cccCCC...
...wwwwww...
...wxxxxw...
...wxxxxw...
...wwwwww...
...wwwwww...
...wwyyww...
...wwyyww...
...wwwwww...
...wwwwww...
ccccwwwwcccc
CCCCwwwwCCCC
.wwwwwwwwww.
.wxxwwwwxxw.
.wxxwwwwxxw.
.wxxwddwxxw.
.wwwwddwwww.
.wwwwddwwww.
.wwwwddwwww.
""",
    "windmill": """
bb........bb
bbb......bbb
.bbb....bbb.
..bbb..bbb..
...bbkkbb...
..ccckkccc..
..ccbkkbcc..
.ccbbccbbCC.
..bbbwwbbb..
.bbbwwwwbbb.
bbb.wwww.bbb
bb..wwww..bb
...wwwwww...
...wwxxww...
...wwxxww...
...wwxxww...
..wwwwwwww..
..wwwwwwww..
..wwwddwww..
.wwwwddwwww.
.wwwwddwwww.
.wwwwddwwww.
""",
    "lighthouse": """
.....CC.....
....cccc....
...cccccc...
...klllllk..
...klllllk..
...klllllk..
..kkkkkkkk..
...cccccc...
...cccCcc...
...cccccc...
...cccccc...
...uuuuuu...
...uuuUuu...
...uuuuuu...
...uuuuuu...
...cccccc...
...ccCccc...
...cccccc...
...cccccc...
...uuuuuu...
...uUuuuu...
...uuuuuu...
..uuuuuuuu..
..cccccccc..
..ccccCccc..
..ccddcccc..
..ccddcccc..
..ccddcccc..
""",
    "stall": """
.cccuuucccuu
cccuuucccuuu
cccuuucccuuu
cccuuucccuuu
CCCUUUCCCUUU
.b........b.
.b.oo.yyg.b.
.b.oo.yyg.b.
.bbbbbbbbbb.
..bBbbBbbB..
..bBbbBbbB..
..bBbbBbbB..
""",
    "pine": """
.....yy.....
.....gg.....
....gggg....
....gccg....
...ggccgg...
...gggggG...
..gccggggg..
....ccgg....
...ggggccg..
...gggGccG..
..ccgggggg..
..ccggggGG..
.gggggccggg.
...gggccgg..
..ccgggggg..
..ccgggggG..
.gggggggccg.
.ggccgggccg.
ggg.ccgg.ggG
.....bb.....
.....bb.....
.....bb.....
""",
    "tree": """
....cccc....
..cccccccc..
.ccuccccccc.
.cuccccccCc.
cccccccccccc
ccccccccccCc
cccccccccCCc
ccccccccccCC
.ccccccccCC.
.cccCccCCCC.
..CcCCCCCC..
....CbbC....
.....bb.....
.....bb.....
.....bb.....
....bbbb....
""",
}
"""What can stand in a slot of the town; every kind shows its colour."""

CLOUDS = (
    "",
    """
....uuuu....
..uuuuuuuu..
.uuuuuuuuuu.
.UUUUUUUUUU.
""",
    """
..uuuu..uu..
.uuuuuuuuuu.
uuuuuuuuuuuu
uuuuuuuuuuuu
.UUUUUUUUUU.
""",
    """
.....uuuuu..
..uuuuuuuuu.
.UUUUUUUUUU.
""",
)
"""Shapes in the sky above a slot; the first is none."""

CLOUD_ROWS = (0, 7, 3, 12)
"""First row of each cloud."""

VERGES = (
    "",
    """
....gggg....
...gggggg...
..ggggcggg..
..gcgggggg..
..ggggggcg..
""",
    """
.u..u..u..u.
.u..u..u..u.
uuuuuuuuuuuu
.u..u..u..u.
.u..u..u..u.
""",
    """
.........u..
.y...c..uyu.
yoy.cyc..u..
.y...c...g..
.g...g...g..
""",
    """
........kkkk
........kllk
........kllk
.........kk.
.........kk.
.........kk.
.........kk.
.........kk.
.........kk.
.........kk.
.........kk.
.........kk.
.........kk.
........kkkk
""",
)
"""Small things between the houses and the road: none, bush, fence, flowers, lamp."""

ACTORS = {
    "balloon": """
..cccCC..
.ccucccC.
ccuccccCC
ccuccccCC
cccccccCC
.cccccCC.
..ccccC..
...k.k...
...k.k...
...bbb...
...bbb...
""",
    "plane": """
C.............
cC....uu......
ccccccccccccc.
.CcxcxcxcxccUU
....CuuCCCCC..
.....UUU......
""",
    "car": """
...cccccc...
..cxxcxxcc..
.cccccccccc.
cccccccccccy
CkkkCCCCkkkC
..kk....kk..
""",
    "bus": """
.cccccccccccccc.
.cxxxcxxxcxxxcx.
.cxxxcxxxcxxxcx.
cccccccccccccccc
uuuuuuuuuuuuuuuy
CCkkkCCCCCCkkkCC
...kk.......kk..
""",
}
"""What moves, looking to the right."""
