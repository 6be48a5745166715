"""Estimates of memory, FLOPs, communication and time of a run, before it starts.

simulation.py      two optimizer steps on tensors without values
tensor_tracker.py  bytes of live tensors by class, and FLOPs
layouts.py         memory and communication of each strategy
step_time.py       seconds of a step on a device
estimate.py        the result, as tables and JSON
"""
