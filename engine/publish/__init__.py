"""Publishing: the model card, and the model hub's repository that a run's model goes to.

Knows the configuration, figures and folders; nothing of losses or of how a model is gathered. What goes wrong at the
hub is a warning: no run waits for it without end, and none ends by it.
"""
