"""What replaces one attention whose sequence is sharded: one scheme per file, and the table of them.

A scheme is plain torch code on local tensors. Query, key and value are one rank's rows; mask, bias and sinks are whole,
and the band is that of the whole sequence. It returns the rank's rows of out and lse.
"""

from sgl_npu.lowering.sequence.choose import Chosen, choose_scheme, refusals
from sgl_npu.lowering.sequence.kv_gather import gather_kv, gathered_attention
from sgl_npu.lowering.sequence.table import SCHEMES, SequenceScheme

__all__ = ["SCHEMES", "Chosen", "SequenceScheme", "choose_scheme", "gather_kv", "gathered_attention", "refusals"]
