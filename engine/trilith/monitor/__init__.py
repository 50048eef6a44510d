"""What a run says about itself: one record per step, sinks that can never stop training, progress and the report."""
