"""Where the tokens of a video are in a sequence: a grid of frames, rows and columns, with other tokens around it."""

from __future__ import annotations

from dataclasses import dataclass

from sgl_npu.runtime.sizes import Size


@dataclass(frozen=True)
class TokenGrid:
    """`frames` x `height` x `width` tokens, frames first, of a sequence with `before` and `after` other tokens.

    A picture has one frame. Other tokens are text, or whatever a model joins with the video's. `source` says, in the
    report's words, where the grid comes from.
    """

    frames: Size
    height: Size
    width: Size
    before: Size = 0
    after: Size = 0
    source: str = ""

    @property
    def frame(self) -> Size:
        """Tokens of one frame."""
        return self.height * self.width

    @property
    def video(self) -> Size:
        """Tokens of the grid."""
        return self.frames * self.frame

    @property
    def length(self) -> Size:
        """Tokens of the sequence."""
        return self.before + self.video + self.after


@dataclass(frozen=True)
class GridSetting:
    """What the user says of the grid; None where nothing is said.

    `latent_shape`: frames, height and width in tokens. `patch_size`: what the latent input, (B, C, T, H, W) or
    (B, C, H, W), is divided by to give them. `text_len` tokens are no video; `prefix` of them stand before it. With
    either shape they are 0 and all of them if not given; otherwise the graph says both, and may contradict.
    """

    latent_shape: tuple[int, int, int] | None = None
    patch_size: tuple[int, int, int] | None = None
    text_len: int | None = None
    prefix: int | None = None
