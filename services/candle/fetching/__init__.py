"""Files of models from elsewhere, fetched within the rules and taken up again after a break."""
