"""One file per check: why, how, what it cannot see; its planted bugs and its healthy look-alikes."""
