"""What `/metrics` shows: vLLM's names where they mean the same, so that dashboards work."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self.running = self._gauge("vllm:num_requests_running", "Continuations under way.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Prompts that wait.")
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts read.")
        self.generated_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From a request to its first token."
        )
        self.queue_seconds = self._histogram(
            "vllm:request_queue_time_seconds", "Time in the queue."
        )
        self.request_seconds = self._histogram(
            "vllm:e2e_request_latency_seconds", "From a request to the end of its answer."
        )
        self.pass_seconds = self._histogram(
            "nearest:forward_pass_seconds", "A pass of the model over all continuations."
        )
        self.mix_seconds = self._histogram(
            "nearest:memory_step_seconds", "Searches and mixing of one step of a method."
        )
        self.answers = Counter(
            "nearest:http_responses",
            "Answers by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.documents = Gauge(
            "nearest:memory_documents", "Documents in a memory.", ["memory"], registry=self.registry
        )
        self.version = Gauge(
            "nearest:memory_version", "Version of a memory.", ["memory"], registry=self.registry
        )

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        gauge = Gauge(name, help_text, ["model_name"], registry=self.registry)
        return gauge.labels(self._model)

    def _counter(self, name: str, help_text: str) -> Counter:
        counter = Counter(name, help_text, ["model_name"], registry=self.registry)
        return counter.labels(self._model)

    def _histogram(self, name: str, help_text: str) -> Histogram:
        histogram = Histogram(
            name, help_text, ["model_name"], registry=self.registry, buckets=_SECONDS
        )
        return histogram.labels(self._model)
