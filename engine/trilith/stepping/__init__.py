"""How training steps follow one another: synchronously, without waiting for the norm, or without draining the pipeline.

A stepper trains spans of steps and gives back each step when it is over, which may be later than the next one began.
"""
