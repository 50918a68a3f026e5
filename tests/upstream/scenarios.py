"""What is run: scenarios, policies and cases, as plain data that requires no framework."""

from __future__ import annotations

from dataclasses import dataclass, replace

LAYERS = 3
HEADS = 4
REPOSITORIES = {
    "Self-Forcing": "wan.modules.causal_model",
    "Causal-Forcing": "wan.modules.causal_model",
    "Infinite-Forcing": "wan.modules.causal_model",
    "One-Forcing": "wan.modules.causal_model",
    "CausVid": "causvid.models.wan.causal_model",
    "LongLive": "wan.modules.causal_model",
    "infinity-rope": "wan.modules.causal_model",
    "MemRoPE": "wan.modules.causal_model",
    "Reward-Forcing": "wan.modules.causal_model",
    "RollingForcing": "wan.modules.causal_model",
    "LongLive2": "wan_5b.modules.causal_model",
    "FastVideo": "fastvideo.models.dits.causal_wanvideo",
    "realtime-video": "wan.modules.causal_model",
    "streamdiffusionv2": "models.wan.causal_model",
}
"""The module of every repository that defines its causal model."""
LIKE_SELF_FORCING = ("Self-Forcing", "Causal-Forcing")
WITH_LONGLIVE = (*LIKE_SELF_FORCING, "LongLive")
WITH_FASTVIDEO = (*LIKE_SELF_FORCING, "FastVideo")
WITH_BOTH = (*WITH_LONGLIVE, "FastVideo")
DTYPES = ("float32", "bfloat16")

UNTOUCHED = "untouched"
AGAIN = "untouched again"
EQUAL = "equal"
WRAPPER = "equal, applied to the wrapper"
REFERENCE = "equal, in the reference store"
GROUPS = "equal, in three head groups"
COMMIT = "equal, in commit forcing"
COMPILED = "equal, every attention one operator of a graph"
CONTROLS = (
    "last frames in the clean pass",
    "no sink",
    "window one frame short",
    "compact positions",
    "unlimited",
    "head budgets",
)
ROLLING_CONTROLS = ("first frames stay where they were", "window six frames wider")
RING_CONTROLS = ("no sink", "window one frame short", "compact positions")
NINE_FRAMES = "the last nine frames"
FIVE_FRAMES = "the last five frames"
PRESET = "streaming_llm"
BASELINES = (UNTOUCHED, AGAIN)


@dataclass(frozen=True)
class Scenario:
    """One way in which a repository is driven.

    Attributes:
        name: Name of the scenario, unique.
        driver: Which driver runs it, see `drivers.DRIVERS`.
        window: Upstream's `local_attn_size` in frames; -1 is global attention.
        sink: Upstream's `sink_size` in frames.
        frames: Frames drawn as noise.
        passes: Forward passes of the model that the driver makes.
        chunk: Frames per chunk.
        batch: Videos per batch.
        image: Whether one clean frame precedes the noise.
        first_steps: Denoising steps of the first chunk where they are its own.
        steps: Denoising steps of every other chunk, before the shift.
        repositories: Which repositories can be driven so.
        switch: The frame from which on another prompt holds.
        shots: In LongLive 2, 1 for a pinned second shot that is moved in time, 2 to empty the cache before.
        raw_keys: Whether upstream's model is the one that keeps keys before RoPE.
        context: In Krea, the frames that are computed again before every chunk.
        fused: In Krea, whether projections are fused, and trained on after that.
        flex: In Krea, whether masks are left to PyTorch's flex attention, which rounds otherwise.
        variant: What else is switched on.
    """

    name: str
    driver: str
    window: int
    sink: int
    frames: int
    passes: int
    chunk: int = 3
    batch: int = 1
    image: bool = False
    first_steps: tuple[int, ...] | None = None
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    repositories: tuple[str, ...] = LIKE_SELF_FORCING
    raw_keys: bool = False
    switch: int = 0
    shots: int = 0
    variant: str = ""
    context: int = 0
    fused: bool = False
    flex: bool = False

    @property
    def calls(self) -> int:
        """Calls of an attention that are served; frames that are computed again come as chunks."""
        begun = range(self.chunk, self.frames if self.context else 0, self.chunk)
        again = sum(-(-min(start, self.context) // self.chunk) - 1 for start in begun)
        return (self.passes + again) * LAYERS


@dataclass(frozen=True)
class Case:
    """One run: a scenario of one repository in one dtype under one policy."""

    repository: str
    scenario: Scenario
    dtype: str
    policy: str = UNTOUCHED

    def __str__(self) -> str:
        """Return the name used for test ids and for saved tensors."""
        return "-".join((self.repository, self.scenario.name, self.dtype, self.policy))

    def under(self, policy: str) -> Case:
        """Return the same run under another policy."""
        return replace(self, policy=policy)


SLIDING = Scenario("w9 s3", "few_step", window=9, sink=3, frames=21, passes=35, repositories=WITH_BOTH)
CAUSVID_STEPS = (1000, 757, 522, 0)
ROLLOUTS = Scenario(
    "rollouts",
    "rollouts",
    window=-1,
    sink=0,
    frames=21,
    passes=7 * 4 + 1 + 6 * 4,
    steps=CAUSVID_STEPS,
    repositories=("CausVid",),
)
PAST_THE_END = replace(ROLLOUTS, name="past the end", driver="past_the_end", frames=27, passes=9 * 4)
FASTVIDEO = replace(SLIDING, repositories=("FastVideo",))
PAST_THE_WINDOW = replace(
    SLIDING,
    name="past the window",
    driver="past_the_end",
    window=-1,
    sink=0,
    frames=24,
    passes=8 * 5,
    repositories=WITH_FASTVIDEO,
)
PAST_ANY_TABLE = replace(
    FASTVIDEO, name="past any table", window=6, sink=1, frames=1032, passes=344 * 2, steps=(1000,)
)
TWO_TRANSFORMERS = replace(
    FASTVIDEO, name="two transformers", driver="two_transformers", frames=18, passes=6 * (4 + 2)
)

RECACHE = Scenario(
    "recache",
    "interactive",
    window=9,
    sink=3,
    frames=27,
    passes=9 * 5 + 1,
    repositories=("LongLive",),
    switch=18,
)
EMPTIED = (
    replace(RECACHE, name="recache, emptied", driver="emptied"),
    replace(RECACHE, name="recache, emptied early", driver="emptied", switch=7),
    replace(RECACHE, name="recache, emptied, raw keys", driver="emptied", raw_keys=True),
)
EMPTIED_UNSAID = (
    replace(RECACHE, name="recache, emptied unsaid", driver="emptied unsaid"),
    replace(RECACHE, name="recache, emptied early unsaid", driver="emptied unsaid", switch=7),
)

ROLLING = Scenario(
    "rolling",
    "few_step",
    window=-1,
    sink=3,
    frames=36,
    passes=2 * 16,
    steps=(1000, 800, 600, 400, 200),
    repositories=("RollingForcing",),
)

SHOTS = Scenario(
    "of chunks of two",
    "few_step",
    window=8,
    sink=2,
    frames=20,
    passes=50,
    chunk=2,
    repositories=("LongLive2",),
)
TWO_SHOTS = replace(SHOTS, name="two shots", shots=1)

REWARD = replace(SLIDING, name="mixed sink", repositories=("Reward-Forcing",))
ONE_SLOT = Scenario(
    "one slot",
    "few_step",
    window=6,
    sink=3,
    frames=21,
    passes=7 * 2,
    steps=(700, 500),
    repositories=("streamdiffusionv2",),
)
RING = replace(ONE_SLOT, name="ring", chunk=1, passes=20, steps=(700,))
RINGS = (RING, replace(RING, name="ring, short", window=5, sink=2))
TWO_STEP_RING = replace(RING, name="ring, two steps", passes=40, steps=(700, 500))
TWICE = replace(RING, name="ring, second video", driver="second_video", frames=20, passes=38)
TWICE_FORGOTTEN = replace(TWICE, name="ring, second video, slots forgotten", variant="slots forgotten")
REFUSED_RINGS = {
    "stream batch": "mode='single-wo'",
    "adaptive sink": "adapt_sink_threshold",
    "positions go back": "t_refresh",
}
"""What is refused, and what the refusal names."""
RINGS_REFUSED = tuple(
    replace(TWO_STEP_RING, name=variant, driver="refused", variant=variant) for variant in REFUSED_RINGS
)

PARITY = (
    Scenario("w6 s0", "few_step", window=6, sink=0, frames=18, passes=30, repositories=WITH_BOTH),
    SLIDING,
    replace(SLIDING, name="w9 s6", sink=6, repositories=WITH_FASTVIDEO),
    replace(SLIDING, name="w7 s1", window=7, sink=1, frames=15, passes=25, repositories=WITH_FASTVIDEO),
    replace(
        SLIDING,
        name="w7 s1 chunk 1",
        window=7,
        sink=1,
        frames=12,
        passes=60,
        chunk=1,
        repositories=WITH_FASTVIDEO,
    ),
    Scenario("image w7 s1", "few_step", window=7, sink=1, frames=18, passes=31, image=True),
    replace(SLIDING, name="batch 2", batch=2, repositories=WITH_LONGLIVE),
    replace(SLIDING, name="raw keys", raw_keys=True, repositories=("LongLive", "FastVideo")),
    replace(SLIDING, name="in a fork", repositories=("One-Forcing",)),
    replace(SLIDING, name="at the slots", raw_keys=True, repositories=("Infinite-Forcing",)),
    replace(FASTVIDEO, name="raw keys, w7 s1", window=7, sink=1, raw_keys=True),
    replace(FASTVIDEO, name="raw keys, global", window=-1, sink=0, raw_keys=True),
    replace(FASTVIDEO, name="alone, global", window=-1, sink=0),
    replace(FASTVIDEO, name="many steps", driver="many_step"),
    replace(FASTVIDEO, name="same caches", driver="same_caches", frames=12, passes=40),
    TWO_TRANSFORMERS,
    ROLLOUTS,
    RECACHE,
    replace(RECACHE, name="recache, early", switch=7),
    replace(RECACHE, name="recache, one switch", driver="one_switch"),
    replace(RECACHE, name="recache, batch 2", batch=2),
    replace(RECACHE, name="recache, raw keys", raw_keys=True),
    replace(RECACHE, name="recache, global", window=-1, sink=0, frames=21, passes=7 * 5 + 1),
    Scenario(
        "global",
        "few_step",
        window=-1,
        sink=0,
        frames=21,
        passes=35,
        batch=2,
        repositories=WITH_LONGLIVE,
    ),
    Scenario(
        "second video",
        "second_video",
        window=6,
        sink=1,
        frames=12,
        passes=40,
        repositories=WITH_BOTH,
    ),
    Scenario(
        "in chunks",
        "in_chunks",
        window=9,
        sink=1,
        frames=27,
        passes=18,
        raw_keys=True,
        repositories=("infinity-rope",),
    ),
    Scenario(
        "in chunks, flushed",
        "flushed",
        window=6,
        sink=1,
        frames=27,
        passes=18,
        raw_keys=True,
        repositories=("infinity-rope",),
    ),
    SHOTS,
    TWO_SHOTS,
    replace(SHOTS, name="chunks of two, batch 2", batch=2),
    replace(SHOTS, name="chunks of two, raw keys", raw_keys=True),
    replace(SHOTS, name="chunks of two, guided", driver="cfg", passes=100),
    replace(SHOTS, name="chunks of two, second video", driver="second_video", passes=100),
    replace(SHOTS, name="chunks of two, image", image=True),
    replace(TWO_SHOTS, name="two shots, emptied", shots=2),
    replace(TWO_SHOTS, name="two shots, raw keys", raw_keys=True),
    replace(TWO_SHOTS, name="two shots, second video", driver="second_video", passes=100),
    replace(TWO_SHOTS, name="two shots, guided", driver="cfg", shots=2, passes=100),
    REWARD,
    replace(REWARD, name="mixed sink, w8 s3", window=8),
    replace(REWARD, name="mixed sink, w8 s2", window=8, sink=2),
    replace(REWARD, name="mixed sink, w7 s1 chunk 1", window=7, sink=1, frames=12, passes=60, chunk=1),
    replace(REWARD, name="mixed sink, batch 2", batch=2),
    replace(REWARD, name="mixed sink, global", window=-1),
    replace(REWARD, name="mixed sink, image", window=7, sink=1, frames=18, passes=31, image=True),
    replace(REWARD, name="mixed sink, second video", driver="second_video", passes=70),
    replace(REWARD, name="mixed sink, guided", driver="cfg", passes=70),
    ONE_SLOT,
    replace(ONE_SLOT, name="one slot, second video", driver="second_video", passes=28),
    ROLLING,
    replace(ROLLING, name="rolling, batch 2", batch=2),
    replace(ROLLING, name="rolling, second video", driver="second_video", frames=27, passes=2 * 2 * 13),
    Scenario("overlap", "overlap", window=9, sink=3, frames=14, passes=10),
    Scenario("cfg", "cfg", window=6, sink=1, frames=12, passes=40),
)
SESSION = Scenario(
    "session",
    "sessions",
    window=-1,
    sink=0,
    frames=18,
    passes=6 * 5 + 5,
    repositories=("realtime-video",),
    context=6,
    fused=True,
)
SESSIONS = (
    SESSION,
    replace(SESSION, name="session, all frames", context=15),
    replace(SESSION, name="session, no whole chunks", context=7),
    replace(SESSION, name="session, three frames", context=3),
    replace(SESSION, name="session, not fused", fused=False),
)
IN_FLEX = tuple(replace(one, name=f"{one.name}, in flex attention", flex=True) for one in SESSIONS)
LEFT_SESSION = replace(SESSION, name="session, removed", driver="left_session")
VERIFIED = tuple(replace(one, name=f"{one.name}, verified", driver="verified") for one in (SESSION, *IN_FLEX))
FIRST_CHUNK = Scenario(
    "own first steps",
    "few_step",
    window=7,
    sink=1,
    frames=12,
    passes=5 + 11 * 2,
    chunk=1,
    first_steps=(1000, 750, 500, 250),
    steps=(1000,),
    repositories=("Causal-Forcing",),
)
PASS_THROUGH = (
    Scenario("no cache", "no_cache", window=-1, sink=0, frames=6, passes=1, repositories=WITH_FASTVIDEO),
    Scenario("gradients", "gradients", window=9, sink=3, frames=3, passes=1, repositories=WITH_FASTVIDEO),
)
REMOVAL = Scenario("removal", "removal", window=9, sink=3, frames=15, passes=50, repositories=WITH_BOTH)
REMOVALS = (
    REMOVAL,
    replace(ROLLING, name="rolling, removal", driver="removal", frames=27, passes=2 * 2 * 13),
    replace(TWO_SHOTS, name="two shots, removal", driver="removal", passes=100),
    replace(ROLLOUTS, name="rollouts, removal", driver="removal", passes=2 * 7 * 4),
    replace(ONE_SLOT, name="one slot, removal", driver="removal", passes=28),
)

GRADIENTS_MIDWAY = Scenario(
    "gradients midway",
    "gradients_midway",
    window=9,
    sink=3,
    frames=6,
    passes=3,
    repositories=WITH_FASTVIDEO,
)
SWITCHES = (
    Scenario("new prompt", "new_prompt", window=9, sink=3, frames=15, passes=10, repositories=WITH_BOTH),
    Scenario("cut", "cut", window=9, sink=3, frames=15, passes=10, repositories=WITH_BOTH),
)
AVERAGES = Scenario(
    "averages",
    "in_chunks",
    window=12,
    sink=3,
    frames=42,
    passes=28,
    raw_keys=True,
    repositories=("MemRoPE",),
)
LONG_AVERAGES = replace(AVERAGES, name="long averages", frames=1032, passes=344 * 2)
PAST_ITS_TABLE = replace(
    PAST_THE_END,
    name="past its table",
    window=9,
    sink=3,
    frames=1032,
    passes=344 * 2,
    steps=(1000,),
    repositories=WITH_LONGLIVE,
)
ENDLESS = replace(
    AVERAGES, name="endless", frames=1032, passes=344 * 2, repositories=("infinity-rope",), window=9, sink=1
)
PAST_TABLES = (
    PAST_ITS_TABLE,
    replace(
        PAST_ITS_TABLE,
        name="rollouts past their table",
        window=-1,
        sink=0,
        steps=(1000, 0),
        repositories=("CausVid",),
    ),
    replace(
        PAST_ITS_TABLE,
        name="rolling past its table",
        window=-1,
        steps=(1000, 500),
        passes=345 * 2,
        repositories=("RollingForcing",),
    ),
    replace(
        PAST_ITS_TABLE,
        name="shots past their table",
        window=12,
        sink=4,
        chunk=4,
        passes=258 * 2,
        repositories=("LongLive2",),
    ),
)
WITHOUT_A_TABLE = (
    PAST_ANY_TABLE,
    ENDLESS,
    replace(ENDLESS, name="endless, raw keys", driver="few_step", repositories=("LongLive",), steps=(1000,)),
)
PAST_ENDS = (PAST_THE_END, PAST_THE_WINDOW, *PAST_TABLES)
AVERAGED = "its averages"
OTHER_AVERAGES = "averages of other weights"
OTHER_SINKS = ("a sink of another weight", "a sink that stays")

EVERY = (*PARITY, FIRST_CHUNK, *PASS_THROUGH, *REMOVALS, GRADIENTS_MIDWAY, *SWITCHES)
SCENARIOS = {
    item.name: item
    for item in (
        *EVERY,
        *PAST_ENDS,
        *WITHOUT_A_TABLE,
        *EMPTIED,
        *EMPTIED_UNSAID,
        AVERAGES,
        LONG_AVERAGES,
        *SESSIONS,
        *IN_FLEX,
        LEFT_SESSION,
        *VERIFIED,
        *(*RINGS, TWO_STEP_RING, TWICE, TWICE_FORGOTTEN, *RINGS_REFUSED),
    )
}


def cases_of(*scenarios: Scenario, policy: str = EQUAL) -> list[Case]:
    """Return the runs of some scenarios in each of their repositories and every dtype."""
    return [
        Case(repository, scenario, dtype, policy)
        for repository in REPOSITORIES
        for dtype in DTYPES
        for scenario in scenarios
        if repository in scenario.repositories
    ]


def control_cases() -> list[Case]:
    """Return the runs whose output must differ from the untouched run's."""
    return [
        *sliding_cases(*CONTROLS),
        *cases_of(ROLLOUTS, policy=NINE_FRAMES),
        *cases_of(RECACHE, policy="no sink"),
        *(case for policy in ("no sink", "compact positions") for case in cases_of(TWO_SHOTS, policy=policy)),
        *(case for policy in ROLLING_CONTROLS for case in cases_of(ROLLING, policy=policy)),
        *(case for policy in RING_CONTROLS for case in cases_of(RING, policy=policy)),
    ]


def sliding_cases(*policies: str) -> list[Case]:
    """Return the sliding-window run of every repository and dtype under each policy."""
    return [case for policy in policies for case in cases_of(SLIDING, policy=policy)]


def parity_cases() -> list[Case]:
    """Return the runs whose output must equal the untouched run's."""
    compiled = cases_of(SLIDING, RECACHE, TWO_SHOTS, ROLLING, ROLLOUTS, ONE_SLOT, policy=COMPILED)
    return [*cases_of(*PARITY, FIRST_CHUNK), *sliding_cases(GROUPS, WRAPPER, REFERENCE, COMMIT), *compiled]


def every_case(policy: str) -> list[Case]:
    """Return every scenario of every repository and dtype under one policy."""
    return cases_of(*EVERY, policy=policy)
