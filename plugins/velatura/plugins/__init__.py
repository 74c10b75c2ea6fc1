"""Built-in adapters, tasks, guidance policies, objectives, distillers, evaluators and observers."""

from collections.abc import Sequence

from velatura.core.hookspecs import hookimpl


@hookimpl
def velatura_adapter() -> Sequence[str]:
    """What makes a network speak velocity."""
    return [
        "diffusers-flow = velatura.plugins.adapters.diffusers_flow:DiffusersFlow",
        "flux = velatura.plugins.adapters.flux:Flux",
        "flux2 = velatura.plugins.adapters.flux2:Flux2",
        "qwen-image = velatura.plugins.adapters.qwen_image:QwenImage",
        "qwen-image-21 = velatura.plugins.adapters.qwen_image_21:QwenImage21",
        "qwen-image-edit-plus = velatura.plugins.adapters.qwen_image_edit_plus:QwenImageEditPlus",
        "sana = velatura.plugins.adapters.sana:Sana",
        "sd3 = velatura.plugins.adapters.sd3:SD3",
        "tinyworld = velatura.plugins.adapters.tinyworld:TinyWorldAdapter",
        "z-image = velatura.plugins.adapters.z_image:ZImage",
    ]


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
        "detached-uncond = velatura.plugins.guidance.policies:DetachedUncond",
        "interval = velatura.plugins.guidance.policies:Interval",
        "none = velatura.plugins.guidance.policies:NoGuidance",
        "rollout-only = velatura.plugins.guidance.policies:RolloutOnly",
        "teacher-only = velatura.plugins.guidance.policies:TeacherOnly",
    ]


@hookimpl
def velatura_objective() -> Sequence[str]:
    """Losses in velocities."""
    return [
        "anchor = velatura.plugins.objectives.regularisers:Anchor",
        "awm = velatura.plugins.objectives.awm:AWM",
        "dgpo = velatura.plugins.objectives.dgpo:DGPO",
        "ema-kl = velatura.plugins.objectives.regularisers:EmaKL",
        "flow-grpo = velatura.plugins.objectives.flow_grpo:FlowGRPO",
        "grpo-guard = velatura.plugins.objectives.grpo_guard:GRPOGuard",
        "kernel-kl = velatura.plugins.objectives.regularisers:KernelKL",
        "nft = velatura.plugins.objectives.nft:NFT",
        "norm-hinge = velatura.plugins.objectives.regularisers:NormHinge",
        "rwr = velatura.plugins.objectives.rwr:RWR",
        "sft = velatura.plugins.objectives.sft:SFT",
        "velocity-kl = velatura.plugins.objectives.regularisers:VelocityKL",
    ]


@hookimpl
def velatura_distiller() -> Sequence[str]:
    """Losses whose target is a teacher."""
    return [
        "opd-kl = velatura.plugins.distillers.step_match:OPDKL",
        "opd-pg = velatura.plugins.distillers.step_match:OPDPG",
        "velocity-match = velatura.plugins.distillers.velocity_match:VelocityMatch",
    ]


@hookimpl
def velatura_evaluator() -> Sequence[str]:
    """Metrics that are never trained on."""
    return ["tinyworld-gold = velatura.plugins.evaluators.tinyworld_gold:TinyWorldGold"]


@hookimpl
def velatura_observer() -> Sequence[str]:
    """Trackers."""
    return ["tensorboard = velatura.plugins.observers.tensorboard:TensorBoard"]
