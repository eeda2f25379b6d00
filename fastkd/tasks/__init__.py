"""What is no distillation run: training a teacher and condensing real data, walked by the same loop, and the plan of a run."""
