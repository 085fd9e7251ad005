"""Our losses inside the trainers people already use: one module each, docs/integrations.md."""
