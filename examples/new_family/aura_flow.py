"""AuraFlow as an adapter of its own: a family in one file."""

import torch
from pydantic import Field

from velatura.api import hookimpl
from velatura.plugins.adapters.conditioning import RowsConditioning
from velatura.plugins.adapters.diffusers_base import DiffusersAdapter, DiffusersOptions
from velatura.plugins.adapters.lora import unwrap
from velatura.plugins.adapters.pictures import from_signed, to_signed


class AuraFlowOptions(DiffusersOptions):
    """What only this family has."""

    text_tokens: int = Field(256, ge=1, description="Length that prompts are padded or cut to.")


class AuraFlow(DiffusersAdapter[AuraFlowOptions]):
    """AuraFlow, text to image. Latents are [B C h w]; guidance is null + scale (cond - null)."""

    name = "aura-flow"
    pipelines = ("AuraFlowPipeline",)
    beside_rows = ("height", "width")  # an encoded prompt serves pictures of every size

    @property
    def shrink(self):
        """Sides of a latent in pixels."""
        return 2 ** (len(self.folder.config("vae")["block_out_channels"]) - 1)

    @property
    def multiple(self):
        """The autoencoder's shrinking times the transformer's patch."""
        return self.shrink * self.folder.config("transformer")["patch_size"]

    def row(self, prompt, text, size):
        """Hidden states of the text encoder [L D], zero where the prompt is padded."""
        with self.on_device("text_encoder"):
            states, *_ = self.pipe.encode_prompt(
                text,
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=self.options.text_tokens,
            )
        return {"text": states[0]}

    def latent_shape(self, size):
        """[C h w]."""
        channels = self.folder.config("transformer")["in_channels"]
        return (channels, size[0] // self.shrink, size[1] // self.shrink)

    def set_times(self, scheduler, steps, tokens):
        """The scheduler's own spacing and shift, whatever the size."""
        scheduler.set_timesteps(steps)

    def velocity(self, net, x, t, cond: RowsConditioning, rows):
        """dx/dt [N C h w]: the network takes times in [0, 1], 1 being noise, and predicts eps - x_0."""
        told, _ = cond.take(rows)
        dtype = unwrap(net).dtype
        (v,) = net(
            x.to(dtype),
            encoder_hidden_states=told["text"].to(dtype),
            timestep=(t * 1000 / 1000).to(dtype),
            return_dict=False,
        )
        return v.float()

    def decode(self, x, prompt=None):
        """[B C h w] to RGB in [0, 1]."""
        with torch.no_grad(), self.on_device("vae") as vae:
            return from_signed(vae.decode(x.to(vae.dtype) / vae.config.scaling_factor).sample)

    def latents(self, images):
        """RGB in [0, 1] to x_0 [B C h w]."""
        with torch.no_grad(), self.on_device("vae") as vae:
            z = vae.encode(to_signed(images).to(vae.dtype)).latent_dist.mode()
            return (z * vae.config.scaling_factor).float()


@hookimpl
def velatura_adapter():
    """What this plugin offers."""
    return [AuraFlow]
