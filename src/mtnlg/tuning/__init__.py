"""Fine-tuning: data of conversations and instructions, and what is trained on them."""
