"""Recipe search: what a sweep's ``search`` section says, its trials, their run on Ray Tune."""
