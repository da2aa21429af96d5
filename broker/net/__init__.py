"""The loop and the sockets that everything else in the broker runs on."""
