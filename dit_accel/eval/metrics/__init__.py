"""Files of metrics, found by folder, each with its `METRICS`; see `dit_accel.eval.metric`."""
