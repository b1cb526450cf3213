"""The doctor: checks that find the bugs which raise no error, in our models and in anybody's."""
