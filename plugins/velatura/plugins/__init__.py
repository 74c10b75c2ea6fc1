"""Built-in adapters, tasks, guidance policies, objectives, distillers, evaluators and observers."""

from collections.abc import Sequence

from velatura.core.hookspecs import hookimpl


@hookimpl
def velatura_adapter() -> Sequence[str]:
    """What makes a network speak velocity."""
    return ["tinyworld = velatura.plugins.adapters.tinyworld:TinyWorldAdapter"]


@hookimpl
def velatura_task() -> Sequence[str]:
    """Where prompts come from."""
    return [
        "prompts = velatura.plugins.tasks.prompt_file:PromptFile",
        "tinyworld = velatura.plugins.tinyworld.task:TinyWorld",
    ]


@hookimpl
def velatura_guidance() -> Sequence[str]:
    """Where the unconditional branch enters."""
    return [
        "both = velatura.plugins.guidance.policies:Both",
        "none = velatura.plugins.guidance.policies:NoGuidance",
        "rollout-only = velatura.plugins.guidance.policies:RolloutOnly",
        "teacher-only = velatura.plugins.guidance.policies:TeacherOnly",
    ]


@hookimpl
def velatura_objective() -> Sequence[str]:
    """Losses in velocities."""
    return [
        "awm = velatura.plugins.objectives.awm:AWM",
        "nft = velatura.plugins.objectives.nft:NFT",
        "sft = velatura.plugins.objectives.sft:SFT",
    ]


@hookimpl
def velatura_distiller() -> Sequence[str]:
    """Losses whose target is a teacher."""
    return ["velocity-match = velatura.plugins.distillers.velocity_match:VelocityMatch"]


@hookimpl
def velatura_evaluator() -> Sequence[str]:
    """Metrics that are never trained on."""
    return ["tinyworld-gold = velatura.plugins.evaluators.tinyworld_gold:TinyWorldGold"]


@hookimpl
def velatura_observer() -> Sequence[str]:
    """Trackers."""
    return ["tensorboard = velatura.plugins.observers.tensorboard:TensorBoard"]
