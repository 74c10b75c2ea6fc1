"""Built-in reward models, advantage estimators and prompt filters."""

from collections.abc import Sequence

from velatura.core.hookspecs import hookimpl


@hookimpl
def velatura_reward() -> Sequence[str]:
    """What is good."""
    return [
        "aesthetic = velatura.rewards.aesthetic:Aesthetic",
        "brisque = velatura.rewards.brisque:Brisque",
        "clip-score = velatura.rewards.image_text:ClipScore",
        "edit-preservation = velatura.rewards.edit_preservation:EditPreservation",
        "editreward = velatura.rewards.ratings:EditReward",
        "editscore = velatura.rewards.written:EditScore",
        "face-identity = velatura.rewards.faces.identity:FaceIdentity",
        "function = velatura.rewards.function:Function",
        "hpsv2 = velatura.rewards.preference:HpsV2",
        "hpsv3 = velatura.rewards.ratings:HpsV3",
        "http = velatura.rewards.remote:Http",
        "image-reward = velatura.rewards.image_reward:ImageReward",
        "ocr = velatura.rewards.ocr:Ocr",
        "pickscore = velatura.rewards.image_text:PickScore",
        "q-judger = velatura.rewards.written:QJudger",
        "portrait-checks = velatura.rewards.faces.portrait:PortraitChecks",
        "saturation = velatura.rewards.guards:Saturation",
        "siglip-score = velatura.rewards.preference:SiglipScore",
        "spectrum = velatura.rewards.guards:Spectrum",
        "tinyworld-aesthetics = velatura.rewards.tinyworld:Aesthetics",
        "tinyworld-alignment = velatura.rewards.tinyworld:Alignment",
        "tinyworld-identity = velatura.rewards.tinyworld:IdentityReward",
        "tinyworld-instruction = velatura.rewards.tinyworld:Instruction",
        "tinyworld-portrait = velatura.rewards.tinyworld:Portrait",
        "tinyworld-preservation = velatura.rewards.tinyworld:Preservation",
        "tinyworld-rater = velatura.rewards.tinyworld_rater:Rater",
        "tinyworld-sharpness = velatura.rewards.tinyworld:Sharpness",
        "unified-reward = velatura.rewards.written:UnifiedReward",
        "vlm-judge = velatura.rewards.judge.reward:VlmJudge",
        "vlm-pairs = velatura.rewards.judge.pairs:VlmPairs",
        "vlm-parts = velatura.rewards.judge.parts:VlmParts",
    ]


@hookimpl
def velatura_advantage() -> Sequence[str]:
    """From scores to how much better than its group a sample is."""
    return [
        "gdpo = velatura.rewards.batch_std:Gdpo",
        "group-mean-global-std = velatura.rewards.batch_std:GroupMeanGlobalStd",
        "group-z = velatura.rewards.advantages:GroupZ",
        "pooled-std = velatura.rewards.reliability:PooledStd",
        "rank-normal = velatura.rewards.advantages:RankNormal",
        "raw-sum = velatura.rewards.advantages:RawSum",
        "reliability-z = velatura.rewards.reliability:ReliabilityZ",
        "winrate = velatura.rewards.advantages:WinRate",
    ]


@hookimpl
def velatura_prompt_filter() -> Sequence[str]:
    """Which prompts are worth learning from."""
    return [
        "difficulty-band = velatura.rewards.difficulty:DifficultyBand",
        "range = velatura.rewards.filters:Range",
        "zero-variance = velatura.rewards.difficulty:ZeroVariance",
    ]


@hookimpl
def velatura_judge_model() -> Sequence[str]:
    """Judges that learn from ratings."""
    return ["vlm = velatura.rewards.judge.vlm:Vlm"]


@hookimpl
def velatura_evaluator() -> Sequence[str]:
    """Metrics that are never trained on."""
    return ["clip-score = velatura.rewards.image_text:ClipMetric"]
