"""What an examiner does with an image: describe it, copy out of it, hash it. Built on block nodes; writes none."""
