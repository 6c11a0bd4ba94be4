"""The tests; modules beside this one are what several rooms of them share."""
