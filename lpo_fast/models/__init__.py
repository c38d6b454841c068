"""Networks: where models come from, their families, text features, LoRAs, and how they compute."""
