"""What happens to one block on one device: weights in, lockstep forward, statistics, solving, weights out."""
