// Reads and writes that go on in background threads, block by block, the operations of one chain one after the other.
//
// Operations of different chains overlap, the oldest first, and the blocks of one operation are spread over all threads.
// A thread waits in its system call, so there are as many threads as blocks may be under way (queue_depth); of them at most
// `workers` copy or sum up at a time, which is what takes a core from training. Threads sleep where there is nothing to do.
// Nothing here knows Python; whoever submits keeps the memory until the operation is done.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "io/file.h"

namespace trilith::io {

enum class Kind : int { read = 0, write = 1, sync = 2 };

// Why a block, and with it its operation, failed: `moved` came short, or what was read is not what was written, or the write
// that it reads had failed, or the gate (see Queue) said no.
enum class Cause : int { none = 0, moved = 1, changed = 2, source = 3, gate = 4 };
struct Fault {
    Cause cause = Cause::none;
    int64_t start = 0, size = 0;  // of the block, within the operation
    Moved moved{0, 0};
};

class Operation;

struct Request {
    Kind kind;
    std::shared_ptr<File> file;
    char* memory;
    int64_t num_bytes, offset;
    int64_t chain;                      // operations of one chain go one after the other, in the order they were submitted
    uint64_t* checksums = nullptr;      // one a block: set by a write, compared by a read; or null
    std::shared_ptr<Operation> source;  // of a read: the write it reads; it fails where that has failed
    int64_t id = 0;                     // the caller's, for the gate
};

// An operation under way. All but `request` belongs to the queue's lock.
class Operation {
  public:
    explicit Operation(Request what) : request(std::move(what)) {}

    const Request request;

  private:
    friend class Queue;
    int64_t num_blocks = 0, num_begun = 0, num_ended = 0;
    bool is_done = false;
    Fault fault;
};

class Queue {
  public:
    // Called before each block is moved, outside of the lock; an errno fails the block. For injected faults.
    using Gate = std::function<int(const Operation&)>;

    Queue(int queue_depth, int workers, int64_t block_bytes, const std::string& name, Gate gate = nullptr);
    ~Queue();
    Queue(const Queue&) = delete;
    Queue& operator=(const Queue&) = delete;

    // Throws std::logic_error after `stop` and in a forked child.
    std::shared_ptr<Operation> submit(Request request);
    // Finishes what was submitted and ends the threads.
    void stop();

    // Whether the operation has ended, after at most `milliseconds`.
    bool wait(const Operation& operation, int64_t milliseconds) const;
    // Whether all have.
    bool wait_all(int64_t milliseconds) const;
    Fault fault(const Operation& operation) const;  // of an operation that has ended
    int64_t bytes_read() const { return bytes_of(&Shared::bytes_read); }
    int64_t bytes_written() const { return bytes_of(&Shared::bytes_written); }

  private:
    using Handle = std::shared_ptr<Operation>;
    struct Shared {
        std::mutex lock;
        std::condition_variable work, ended, turn;
        std::unordered_map<int64_t, std::deque<Handle>> chains;  // the first of each is under way
        std::deque<Handle> ready;                                // under way, and with blocks not begun
        int free_turns;
        bool is_stopped = false;
        int64_t bytes_read = 0, bytes_written = 0;
    };
    class Turn;
    class Buffer;

    int64_t bytes_of(int64_t Shared::*counter) const;
    void serve();
    Fault run_block(const Operation& operation, int64_t index, Buffer& buffer);
    void begin(const Handle& operation);
    void end(const Handle& operation);

    const int64_t block_bytes_;
    const Gate gate_;
    const int process_;
    Shared* shared_;  // left behind in a forked child, where another thread may have held the lock
    std::vector<std::thread>* threads_;
};

}  // namespace trilith::io
