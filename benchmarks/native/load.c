// A closed-loop load of chat completions: CONNECTIONS keep-alive connections, each with one request in flight.
//
//   cc -O2 -o load load.c && ./load PORT CONNECTIONS REQUESTS PROMPT_BYTES EVENTS GAP_US RAMP_MS [HEADER]
//
// EVENTS 0 asks for whole answers, else for streams of EVENTS events GAP_US apart. Connections start spread over RAMP_MS.
// Prints one line of JSON: counts, and quantiles in microseconds of the time to the whole answer (latency), to the first
// event (ttft), and of the age of every event on arrival (event_age: what lies between engine and client; needs
// engine.c's marks and the same machine). One thread, epoll; Linux.
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
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

typedef struct { float *values; size_t size, capacity; } Sample;
typedef enum { HEAD, BODY, CHUNK_SIZE, CHUNK, CHUNK_END, TRAILER } Part;

typedef struct {
  int fd, busy, status, close_after;
  Part part;
  size_t left, sent, held_size;
  char held[4096];  // of a head or a chunk's size
  char line[4096];  // of an event
  size_t line_size;
  uint64_t begin_ns;
  long events, done;
} Connection;

static int poller;
static struct sockaddr_in target = {.sin_family = AF_INET};
static char *request;
static size_t request_size;
static long wanted, started, ended, good, events_wanted;
static Sample latency, ttft, age;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static void add(Sample *s, double us) {
  if (s->size == s->capacity) {
    s->capacity = s->capacity ? 2 * s->capacity : 4096;
    s->values = realloc(s->values, s->capacity * sizeof *s->values);
    if (!s->values) abort();
  }
  s->values[s->size++] = us;
}

static int by_value(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static void print_sample(const char *name, Sample *s) {
  if (!s->size) return;
  qsort(s->values, s->size, sizeof *s->values, by_value);
  printf(",\"%s_us\":{\"n\":%zu,\"p50\":%.1f,\"p99\":%.1f}", name, s->size, s->values[s->size / 2],
         s->values[(size_t)(s->size * 0.99)]);
}

static void open_connection(Connection *c) {
  int one = 1;
  c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  if (connect(c->fd, (void *)&target, sizeof target) && errno != EINPROGRESS) { perror("load: connect"); exit(1); }
  struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
  epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &e);
}

static void push(Connection *c) {
  while (c->sent < request_size) {
    ssize_t n = send(c->fd, request + c->sent, request_size - c->sent, MSG_NOSIGNAL);
    if (n < 0) break;
    c->sent += n;
  }
  struct epoll_event e = {.events = EPOLLIN | (c->sent < request_size ? EPOLLOUT : 0), .data.ptr = c};
  epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
}

static void begin(Connection *c) {
  c->busy = 0;
  if (started >= wanted) return;
  started++;
  c->busy = 1;
  c->part = HEAD;
  c->status = c->close_after = 0;
  c->sent = c->held_size = c->line_size = 0;
  c->events = c->done = 0;
  c->begin_ns = now_ns();
  push(c);
}

static void finish(Connection *c, int whole) {
  ended++;
  if (whole && c->status == 200 && (!events_wanted || (c->done && c->events >= events_wanted))) {
    good++;
    add(&latency, (now_ns() - c->begin_ns) / 1e3);
  }
  if (!whole || c->close_after) {
    epoll_ctl(poller, EPOLL_CTL_DEL, c->fd, 0);
    close(c->fd);
    open_connection(c);
    c->busy = 2;  // begins once it is connected
    return;
  }
  begin(c);
}

static void on_line(Connection *c) {
  if (c->line_size < 6 || memcmp(c->line, "data:", 5)) return;
  c->line[c->line_size] = 0;
  if (strstr(c->line, "[DONE]")) { c->done = 1; return; }
  char *mark = strstr(c->line, ";s=");
  if (!mark) return;
  uint64_t now = now_ns();
  if (!c->events++) add(&ttft, (now - c->begin_ns) / 1e3);
  add(&age, ((double)now - (double)strtoull(mark + 3, 0, 10)) / 1e3);
}

static void on_body(Connection *c, const char *bytes, size_t size) {
  if (!events_wanted) return;
  for (size_t i = 0; i < size; i++) {
    if (bytes[i] == '\n') { on_line(c); c->line_size = 0; }
    else if (c->line_size < sizeof c->line - 1) c->line[c->line_size++] = bytes[i];
  }
}

// One line of a head, or a chunk's size, collected in ``held``; the bytes used, and in ``whole`` whether it ended.
static size_t collect_line(Connection *c, const char *bytes, size_t size, int *whole) {
  const char *end = memchr(bytes, '\n', size);
  size_t used = end ? (size_t)(end - bytes) + 1 : size;
  for (size_t i = 0; i < used && c->held_size < sizeof c->held - 1; i++) c->held[c->held_size++] = bytes[i];
  c->held[c->held_size] = 0;
  *whole = end != 0;
  return used;
}

static void on_head_line(Connection *c) {
  char *line = c->held;
  if (!c->status) { c->status = atoi(line + 9); c->left = 0; c->part = HEAD; return; }
  if (!strncasecmp(line, "content-length:", 15)) c->left = strtoul(line + 15, 0, 10) + 1;  // 0 = none
  if (!strncasecmp(line, "transfer-encoding:", 18)) c->left = SIZE_MAX;
  if (!strncasecmp(line, "connection:", 11) && strcasestr(line, "close")) c->close_after = 1;
  if (line[0] != '\r') return;
  if (c->left == SIZE_MAX) { c->part = CHUNK_SIZE; return; }
  c->part = BODY;
  c->left = c->left ? c->left - 1 : 0;
}

// Reads an answer; false once it has ended.
static int on_bytes(Connection *c, const char *bytes, size_t size) {
  while (size) {
    int whole = 0;
    size_t used;
    switch (c->part) {
      case HEAD:
        used = collect_line(c, bytes, size, &whole);
        if (whole) { on_head_line(c); c->held_size = 0; }
        if (c->part == BODY && !c->left) { finish(c, 1); return 0; }
        break;
      case BODY:
        used = size < c->left ? size : c->left;
        on_body(c, bytes, used);
        if (!(c->left -= used)) { finish(c, 1); return 0; }
        break;
      case CHUNK_SIZE:
        used = collect_line(c, bytes, size, &whole);
        if (whole) { c->left = strtoul(c->held, 0, 16); c->held_size = 0; c->part = c->left ? CHUNK : TRAILER; }
        break;
      case CHUNK:
        used = size < c->left ? size : c->left;
        on_body(c, bytes, used);
        if (!(c->left -= used)) { c->part = CHUNK_END; c->left = 2; }
        break;
      case CHUNK_END:
        used = size < c->left ? size : c->left;
        if (!(c->left -= used)) c->part = CHUNK_SIZE;
        break;
      default:
        used = collect_line(c, bytes, size, &whole);
        if (whole && c->held_size <= 2) { finish(c, 1); return 0; }
        if (whole) c->held_size = 0;
    }
    bytes += used;
    size -= used;
  }
  return 1;
}

static void on_readable(Connection *c) {
  static char bytes[1 << 18];
  ssize_t n = recv(c->fd, bytes, sizeof bytes, 0);
  if (n > 0) { on_bytes(c, bytes, n); return; }
  if (n < 0 && errno == EAGAIN) return;
  if (c->busy == 1) { finish(c, 0); return; }
  epoll_ctl(poller, EPOLL_CTL_DEL, c->fd, 0);  // closed while idle
  close(c->fd);
  open_connection(c);
}

static void make_request(long prompt, long events, long gap_us, const char *header) {
  static const char words[] = "Tell me of a quiet town by the sea where nothing ever happens until the ferry is late. ";
  char *body = malloc(prompt + 512);
  request = malloc(prompt + 2048);
  if (!body || !request) abort();
  int n = sprintf(body, "{\"model\":\"mock\",\"messages\":[{\"role\":\"system\",\"content\":\"You are brief.\"},"
                        "{\"role\":\"user\",\"content\":\"");
  for (long i = 0; i < prompt; i++) body[n++] = words[i % (sizeof words - 1)];
  n += sprintf(body + n, "\"}],\"max_tokens\":%ld,\"temperature\":0.7,\"seed\":%ld,\"stream\":%s}", events ? events : 32,
               gap_us, events ? "true" : "false");
  request_size = sprintf(request,
                         "POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nUser-Agent: OpenAI/Python\r\n"
                         "Accept: application/json\r\nContent-Type: application/json\r\n%s%sContent-Length: %d\r\n\r\n",
                         header, header[0] ? "\r\n" : "", n);
  memcpy(request + request_size, body, n);
  request_size += n;
  free(body);
}

int main(int count, char **arguments) {
  if (count < 8) {
    fprintf(stderr, "usage: load PORT CONNECTIONS REQUESTS PROMPT_BYTES EVENTS GAP_US RAMP_MS [HEADER]\n");
    return 2;
  }
  long size = atol(arguments[2]), opened = 0;
  target.sin_port = htons(atoi(arguments[1]));
  target.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  wanted = atol(arguments[3]);
  events_wanted = atol(arguments[5]);
  double ramp_ns = atof(arguments[7]) * 1e6;
  make_request(atol(arguments[4]), events_wanted, atol(arguments[6]), count > 8 ? arguments[8] : "");
  signal(SIGPIPE, SIG_IGN);
  struct rlimit files = {65536, 65536};
  setrlimit(RLIMIT_NOFILE, &files);
  poller = epoll_create1(0);
  Connection *connections = calloc(size, sizeof *connections);
  if (!connections) abort();
  uint64_t begin_ns = now_ns(), heard_ns = begin_ns;
  struct epoll_event ready[512];
  while (ended < wanted) {
    for (; opened < size && now_ns() >= begin_ns + (uint64_t)(ramp_ns * opened / size); opened++) {
      connections[opened].busy = 2;
      open_connection(&connections[opened]);
    }
    int n = epoll_wait(poller, ready, 512, opened < size ? 1 : 100);
    if (n) heard_ns = now_ns();
    if (now_ns() - heard_ns > 30000000000u) { fprintf(stderr, "load: nothing heard for 30 s\n"); return 1; }
    for (int i = 0; i < n; i++) {
      Connection *c = ready[i].data.ptr;
      if (ready[i].events & EPOLLOUT) {
        if (c->busy == 2) begin(c); else push(c);
      }
      if (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) on_readable(c);
    }
  }
  printf("{\"requests\":%ld,\"good\":%ld,\"seconds\":%.3f", ended, good, (now_ns() - begin_ns) / 1e9);
  print_sample("latency", &latency);
  print_sample("ttft", &ttft);
  print_sample("event_age", &age);
  printf("}\n");
  return 0;
}
