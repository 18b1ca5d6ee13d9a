"""Capture once, replay every step: a graph for each size of a decode step, behind one callable.

before: model(input_ids, position_ids)         hundreds of kernels launched one by one
after:  copy the inputs into fixed buffers, replay one graph, hand out a copy of its outputs

`runner.py` is the callable; `signature.py` says which graph a call needs, `buckets.py` how far it is padded,
`buffers.py` and `outputs.py` what is copied in and out; `cuda.py` and `npu.py` are the two kinds of graphs.
"""
