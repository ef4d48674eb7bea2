"""One file a metric, each found by its name and declared as `METRIC`; see `dit_accel.eval.metric`."""
