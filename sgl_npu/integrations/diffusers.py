"""diffusers: tell compiled transformers which denoising step a pipeline is in.

compiled = torch.compile(pipe.transformer, backend="sgl_npu", options={"attention": "rain_fusion_attn", ...})
pipe.transformer = compiled
pipe(prompt, callback_on_step_end=DenoisingSteps())
"""

from __future__ import annotations

from typing import Any

from sgl_npu.runtime.denoising import announce_step


class DenoisingSteps:
    """A pipeline's `callback_on_step_end`. A pipeline calls it when a step has ended, so make one for every run of it.

    Making it announces step 0. `then`: another callback, called with the same arguments.
    """

    def __init__(self, then: Any = None) -> None:
        self.then = then
        announce_step(0)

    @property
    def tensor_inputs(self) -> list[str]:
        """What diffusers' own callbacks say they want in `callback_kwargs`."""
        return list(getattr(self.then, "tensor_inputs", ()))

    def __call__(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        announce_step(step + 1)
        return callback_kwargs if self.then is None else self.then(pipe, step, timestep, callback_kwargs)
