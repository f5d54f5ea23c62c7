"""GPT-assisted scores: reviews and grades of answers by a chat model behind any OpenAI-like API."""
