"""Object stores and web servers: schemes, requests and their failures, byte ranges. Nothing else knows servers."""
