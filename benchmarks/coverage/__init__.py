"""How much attention the backend finds: tiny models of many families, each measured in a process of its own."""
