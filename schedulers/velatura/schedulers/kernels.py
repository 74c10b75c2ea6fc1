"""Solver steps, written as distributions over the next state."""

from __future__ import annotations

from torch import Tensor

from velatura.api import Kernel, NoOptions, Transition


class Ode(Kernel[NoOptions]):
    """The deterministic Euler step of the probability-flow ODE.

    x_{t_next} = x_t + (t_next - t) v(x_t, t), with v = dx/dt = eps - x_0 and t_next < t. Nothing is drawn: std 0.
    First order in the step size (Liu et al., Flow Straight and Fast, arXiv:2209.03003; the 40-step sampler of
    Qwen-Image-2.0-RL, arXiv:2606.27608).
    """

    name = "ode"

    def step(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Transition:
        """Mean [B ...] of x_{t_next}; std is the scalar 0."""
        return Transition(mean=x + (t_next - t) * v, std=x.new_zeros(()))
