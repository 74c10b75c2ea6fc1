"""Solver steps, written as distributions over the next state."""

from __future__ import annotations

from torch import Tensor

from velatura.api import Kernel, NoOptions, State, Transition


class Ode(Kernel[NoOptions]):
    """The deterministic Euler step of the probability-flow ODE.

    x_{t_next} = x_t + (t_next - t) v(x_t, t), with v = dx/dt = eps - x_0 and t_next < t. Nothing is drawn: std 0.
    First order in the step size (Liu et al., Flow Straight and Fast, arXiv:2209.03003; the 40-step sampler of
    Qwen-Image-2.0-RL, arXiv:2606.27608).
    """

    name = "ode"

    def step(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Transition:
        """Mean [B ...] of x_{t_next}; std is the scalar 0."""
        return _euler(v, x, t, t_next)


class Heun(Kernel[NoOptions]):
    """Heun's second-order step of the ODE: the mean of the velocities at both ends of an Euler step.

    y = x + (t_next - t) v(x, t),   x_{t_next} = x + (t_next - t) (v(x, t) + v(y, t_next)) / 2 (Karras et al.,
    arXiv:2206.00364, algorithm 1, with the time of the flow in place of sigma). Two velocities a step, one on the last,
    which ends at t = 0 and is Euler's, as in the source. It draws nothing: std 0.
    """

    name = "heun"
    evaluations = 2

    def step(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Transition:
        """Euler's step, from which the second velocity is asked for."""
        return _euler(v, x, t, t_next)

    def midway(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> State | None:
        """The end of the Euler step; None where that is t = 0."""
        return State(x=_euler(v, x, t, t_next).mean, t=t_next) if bool((t_next > 0).all()) else None

    def corrected(self, v: Tensor, v_midway: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """x_{t_next} [B ...]."""
        return x + (t_next - t) * (v + v_midway) / 2


class Dpm2(Kernel[NoOptions]):
    """The second-order step of DPM-Solver-2: the velocity in the middle of the step, in the logarithm of time.

    t_m = sqrt(t t_next),   x_m = x + (t_m - t) v(x, t),   x_{t_next} = x + (t_next - t) v(x_m, t_m)
    (Lu et al., DPM-Solver, arXiv:2206.00927, in the form of Karras et al., arXiv:2206.00364, whose sigma is the time of
    the flow here). The source takes the middle in the logarithm of the signal-to-noise ratio, which has a pole at
    t = 1; that of time has none, and is of second order, too. The last step, to t = 0, is Euler's. It draws nothing:
    std 0.
    """

    name = "dpm2"
    evaluations = 2

    def step(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Transition:
        """Euler's step, of which the first part leads to where the second velocity is asked for."""
        return _euler(v, x, t, t_next)

    def midway(self, v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> State | None:
        """The state at the geometric mean of both times; None where the step ends at t = 0."""
        if not bool((t_next > 0).all()):
            return None
        middle = (t * t_next).sqrt()
        return State(x=_euler(v, x, t, middle).mean, t=middle)

    def corrected(self, v: Tensor, v_midway: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """x_{t_next} [B ...]."""
        return x + (t_next - t) * v_midway


def _euler(v: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Transition:
    return Transition(mean=x + (t_next - t) * v, std=x.new_zeros(()))
