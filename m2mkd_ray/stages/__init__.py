"""What runs: one file a kind of stage. Here alone models, data, training and execution meet."""
