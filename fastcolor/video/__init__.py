"""The room for film: reader, frame pipeline, temporal field, writer. Empty in this version."""
