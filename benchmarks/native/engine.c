// A vLLM-shaped HTTP server that costs next to nothing, so that what is measured in front of it is the gateway.
//
//   cc -O2 -o engine engine.c && ./engine PORT
//
// One thread, epoll, HTTP/1.1 keep-alive; Linux. What it does is told in the request body, in fields that any gateway
// passes on:
//   "stream": true    answers with "max_tokens" events, "seed" microseconds apart; else with one JSON answer
//                     (sglang-router writes the body anew and says "max_completion_tokens" instead)
//   "include_usage"   true anywhere in the body: one more event with the usage
// Every event carries the CLOCK_MONOTONIC nanoseconds at which it was sent ("s=..."), and the first of a stream those at
// which the request was read ("r=..."): a load generator on the same machine can tell what lies between.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { IN_LIMIT = 4 << 20, OUT_LIMIT = 1 << 20, EVENTS = 256 };

typedef struct Connection {
  int fd, dead, wants_out, usage;
  char *in, *out;
  size_t in_size, in_capacity, out_size, out_capacity;
  long events_left, events_sent;
  uint64_t gap_ns, due_ns, read_ns;
  struct Connection *next_due, *previous_due, *next_grave;
  int scheduled;
} Connection;

static int poller;
static Connection due = {.next_due = &due, .previous_due = &due};  // streams, the next due first
static Connection *graves;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static void unschedule(Connection *c) {
  if (!c->scheduled) return;
  c->previous_due->next_due = c->next_due;
  c->next_due->previous_due = c->previous_due;
  c->scheduled = 0;
}

// Gaps are mostly equal, so the place is near the end.
static void schedule(Connection *c) {
  Connection *before = due.previous_due;
  while (before != &due && before->due_ns > c->due_ns) before = before->previous_due;
  c->previous_due = before;
  c->next_due = before->next_due;
  before->next_due->previous_due = c;
  before->next_due = c;
  c->scheduled = 1;
}

static void bury(Connection *c) {
  if (c->dead) return;
  c->dead = 1;
  unschedule(c);
  close(c->fd);
  c->next_grave = graves;
  graves = c;
}

static void *grown(void *memory, size_t *capacity, size_t wanted) {
  if (wanted <= *capacity) return memory;
  *capacity = wanted * 2;
  memory = realloc(memory, *capacity);
  if (!memory) abort();
  return memory;
}

static void watch(Connection *c, int out) {
  if (c->wants_out == out) return;
  c->wants_out = out;
  struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP | (out ? EPOLLOUT : 0), .data.ptr = c};
  epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
}

static void flush(Connection *c) {
  ssize_t n = send(c->fd, c->out, c->out_size, MSG_NOSIGNAL);
  if (n < 0 && errno != EAGAIN) { bury(c); return; }
  if (n > 0) { memmove(c->out, c->out + n, c->out_size - n); c->out_size -= n; }
  watch(c, c->out_size > 0);
}

static void put(Connection *c, const char *bytes, size_t size) {
  if (c->dead) return;
  if (!c->out_size) {
    ssize_t n = send(c->fd, bytes, size, MSG_NOSIGNAL);
    if (n == (ssize_t)size) return;
    if (n < 0 && errno != EAGAIN) { bury(c); return; }
    if (n > 0) { bytes += n; size -= n; }
  }
  if (c->out_size + size > OUT_LIMIT) { bury(c); return; }
  c->out = grown(c->out, &c->out_capacity, c->out_size + size);
  memcpy(c->out + c->out_size, bytes, size);
  c->out_size += size;
  watch(c, 1);
}

static void put_chunk(Connection *c, const char *payload, int size) {
  char framed[1024];
  int n = snprintf(framed, sizeof framed, "%x\r\n%.*s\r\n", size, size, payload);
  put(c, framed, n);
}

static void send_event(Connection *c) {
  char event[768];
  int first = c->events_sent == 0, last = c->events_left == 1;
  int n = snprintf(event, sizeof event,
                   "data: {\"id\":\"chatcmpl-6d6f636b656e67696e65\",\"object\":\"chat.completion.chunk\",\"created\":1760000000,"
                   "\"model\":\"mock\",\"choices\":[{\"index\":0,\"delta\":{%s\"content\":\"r=%llu;s=%llu;\"},"
                   "\"logprobs\":null,\"finish_reason\":%s}]}\n\n",
                   first ? "\"role\":\"assistant\"," : "", (unsigned long long)c->read_ns,
                   (unsigned long long)now_ns(), last ? "\"stop\"" : "null");
  put_chunk(c, event, n);
  c->events_sent++;
  if (--c->events_left) return;
  if (c->usage) {
    n = snprintf(event, sizeof event,
                 "data: {\"id\":\"chatcmpl-6d6f636b656e67696e65\",\"object\":\"chat.completion.chunk\",\"created\":1760000000,"
                 "\"model\":\"mock\",\"choices\":[],\"usage\":{\"prompt_tokens\":64,\"total_tokens\":%ld,"
                 "\"completion_tokens\":%ld}}\n\n", 64 + c->events_sent, c->events_sent);
    put_chunk(c, event, n);
  }
  static const char end[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
  put(c, end, sizeof end - 1);
}

static long number_after(const char *body, size_t size, const char *name, long otherwise) {
  const char *at = memmem(body, size, name, strlen(name)), *end = body + size;
  if (!at) return otherwise;
  at += strlen(name);
  while (at < end && (*at == ' ' || *at == ':')) at++;
  return at < end && *at >= '0' && *at <= '9' ? strtol(at, 0, 10) : otherwise;
}

static int is_true_after(const char *body, size_t size, const char *name) {
  const char *at = memmem(body, size, name, strlen(name)), *end = body + size;
  if (!at) return 0;
  at += strlen(name);
  while (at < end && (*at == ' ' || *at == ':')) at++;
  return at < end && *at == 't';
}

static void answer(Connection *c, const char *kind, const char *body, int size) {
  char whole[2048];
  int n = snprintf(whole, sizeof whole,
                   "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%.*s", kind, size,
                   size, body);
  put(c, whole, n);
}

static void serve(Connection *c, const char *target, const char *body, size_t size) {
  char text[1024];
  c->read_ns = now_ns();
  if (!strstr(target, "/completions")) {  // what gateways ask of an engine before they use it
    int n = snprintf(text, sizeof text,
                     "{\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\",\"created\":1,"
                     "\"owned_by\":\"vllm\",\"max_model_len\":131072}],\"model_path\":\"mock\",\"version\":\"0.32.0\"}");
    answer(c, "application/json", text, n);
    return;
  }
  if (!is_true_after(body, size, "\"stream\"")) {
    int n = snprintf(text, sizeof text,
                     "{\"id\":\"chatcmpl-6d6f636b656e67696e65\",\"object\":\"chat.completion\",\"created\":1760000000,"
                     "\"model\":\"mock\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"r=%llu; The "
                     "ferry leaves at nine, said the harbour master, and he was right about it every morning but one, of "
                     "which nobody in the town speaks.\",\"tool_calls\":[]},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
                     "\"usage\":{\"prompt_tokens\":64,\"total_tokens\":96,\"completion_tokens\":32}}",
                     (unsigned long long)c->read_ns);
    answer(c, "application/json", text, n);
    return;
  }
  c->events_left = number_after(body, size, "\"max_completion_tokens\"", number_after(body, size, "\"max_tokens\"", 16));
  if (c->events_left < 1) c->events_left = 1;
  c->events_sent = 0;
  c->usage = is_true_after(body, size, "\"include_usage\"");
  c->gap_ns = 1000u * (uint64_t)number_after(body, size, "\"seed\"", 0);
  c->due_ns = c->read_ns;
  static const char head[] =
      "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
      "transfer-encoding: chunked\r\n\r\n";
  put(c, head, sizeof head - 1);
  if (!c->dead) schedule(c);
}

// Bytes of the first request in ``in``; 0 = not all there, -1 = not understood. Bodies come with a length or in chunks.
static long take_request(Connection *c) {
  char *head_end = memmem(c->in, c->in_size, "\r\n\r\n", 4);
  if (!head_end) return c->in_size > 65536 ? -1 : 0;
  size_t head = head_end + 4 - c->in, length = 0;
  int chunked = 0;
  char target[256] = "";
  if (sscanf(c->in, "%*s %255s", target) != 1) return -1;
  for (char *line = memmem(c->in, head, "\r\n", 2); line && line < head_end; line = memmem(line + 2, head_end + 2 - line - 2, "\r\n", 2)) {
    if (!strncasecmp(line + 2, "content-length:", 15)) length = strtoul(line + 17, 0, 10);
    if (!strncasecmp(line + 2, "transfer-encoding:", 18)) chunked = 1;
  }
  if (!chunked) {
    if (head + length > c->in_size) return 0;
    char *body = malloc(length + 1);
    if (!body) abort();
    memcpy(body, c->in + head, length);
    body[length] = 0;
    serve(c, target, body, length);
    free(body);
    return head + length;
  }
  size_t at = head, size = 0;
  char *body = malloc(c->in_size + 1);
  if (!body) abort();
  for (;;) {
    char *line = memmem(c->in + at, c->in_size - at, "\r\n", 2);
    size_t piece = line ? strtoul(c->in + at, 0, 16) : 0, begin = line ? (size_t)(line + 2 - c->in) : 0;
    if (!line || begin + piece + 2 > c->in_size) { free(body); return 0; }
    memcpy(body + size, c->in + begin, piece);
    size += piece;
    at = begin + piece + 2;
    if (!piece) break;
  }
  body[size] = 0;
  serve(c, target, body, size);
  free(body);
  return at;
}

static void take_requests(Connection *c) {
  while (c->in_size && !c->dead && !c->scheduled) {
    long taken = take_request(c);
    if (taken < 0) { bury(c); return; }
    if (!taken || c->dead) return;
    memmove(c->in, c->in + taken, c->in_size - taken);
    c->in_size -= taken;
  }
}

static void read_some(Connection *c) {
  for (;;) {
    c->in = grown(c->in, &c->in_capacity, c->in_size + 16384);
    ssize_t n = recv(c->fd, c->in + c->in_size, c->in_capacity - c->in_size - 1, 0);
    if (n < 0 && errno == EAGAIN) break;
    if (n <= 0 || c->in_size + n > IN_LIMIT) { bury(c); return; }
    c->in_size += n;
    c->in[c->in_size] = 0;
  }
  take_requests(c);
}

static void accept_all(int listener) {
  for (int fd; (fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0;) {
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    Connection *c = calloc(1, sizeof *c);
    if (!c) abort();
    c->fd = fd;
    struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e);
  }
}

int main(int count, char **arguments) {
  if (count != 2) { fprintf(stderr, "usage: engine PORT\n"); return 2; }
  signal(SIGPIPE, SIG_IGN);
  int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(atoi(arguments[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  if (bind(listener, (void *)&here, sizeof here) || listen(listener, 4096)) { perror("engine"); return 1; }
  poller = epoll_create1(0);
  struct epoll_event e = {.events = EPOLLIN, .data.ptr = 0}, ready[EVENTS];
  epoll_ctl(poller, EPOLL_CTL_ADD, listener, &e);
  for (;;) {
    int wait_ms = -1;
    if (due.next_due != &due) {
      uint64_t t = now_ns();
      wait_ms = due.next_due->due_ns <= t ? 0 : (int)((due.next_due->due_ns - t) / 1000000u) + 1;
    }
    int n = epoll_wait(poller, ready, EVENTS, wait_ms);
    for (int i = 0; i < n; i++) {
      Connection *c = ready[i].data.ptr;
      if (!c) { accept_all(listener); continue; }
      if (!c->dead && ready[i].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) read_some(c);
      if (!c->dead && ready[i].events & EPOLLOUT) flush(c);
    }
    uint64_t t = now_ns();
    Connection *last = due.previous_due;
    for (Connection *c = due.next_due; c != &due && c->due_ns <= t;) {
      Connection *next = c == last ? &due : c->next_due;  // one event a stream and turn: an engine's step
      unschedule(c);
      send_event(c);
      if (!c->dead && c->events_left) { c->due_ns += c->gap_ns; schedule(c); } else if (!c->dead) take_requests(c);
      c = next;
    }
    while (graves) {
      Connection *c = graves;
      graves = c->next_grave;
      free(c->in); free(c->out); free(c);
    }
  }
}
