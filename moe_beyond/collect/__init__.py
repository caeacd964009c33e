"""Recording a model's routing."""
