"""Measuring: FLOPs, latency, accuracy on bundled questions, and the run that puts them side by side (`vtc bench`).

Modules are imported one by one (`from vtc.eval import flops`), so that none pays for another's dependencies.
"""
