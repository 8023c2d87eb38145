"""From documents to blocks of tokens: sources, encoding, the token store, the order of the run."""
