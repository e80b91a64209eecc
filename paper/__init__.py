"""The paper's experiment: pretrainings and fine-tunings in one table. Like the demo, it calls every stage."""
