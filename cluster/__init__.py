"""On which machines: the Ray session, the pool of workers, and the exchange of arrays between them."""
