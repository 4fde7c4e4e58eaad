"""Training with Lightning: tasks, moving averages, exact resume, pictures and figures."""
