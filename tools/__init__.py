"""Programs that use an artifact of train_gpt.py: codec.py, sample.py, explain.py; and plan.py, which needs none."""
