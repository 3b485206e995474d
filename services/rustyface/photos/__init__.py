"""From the bytes of a photo to its faces and their embeddings; knows no dataset and no subject."""
