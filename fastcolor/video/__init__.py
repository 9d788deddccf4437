"""The room for film: reader, frames to chroma planes with a state through time, writer."""
