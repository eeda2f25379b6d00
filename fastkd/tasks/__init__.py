"""What is no distillation run but is walked by the same loop: training a teacher."""
