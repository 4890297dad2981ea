"""What serves: the OpenAI-compatible application, the streaming relay, admission, errors and metrics."""
