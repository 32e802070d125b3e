"""The five stages and what runs them: composition only, the algorithms live below."""
