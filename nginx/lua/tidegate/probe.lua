--- Connects to new peers, and admits those that accept.
--
-- Why: a task is RUNNING before its process listens; a peer that takes no connection yet must not
-- get requests, and where its upstream has an HTTP check, none that does not pass it. A push may
-- renew 100,000 peers at once while requests go on, so the work is paced: a few connections are
-- begun at a time and a bounded number is under way, upstreams take turns, those that nobody serves
-- come first, and those that requests wait for before them. What is kept per upstream is a few
-- words, and one more per peer that has failed.
--
-- The worker that applied a push begins at once, others help within a second; an upstream that is
-- begun belongs to one worker, and to any other one soon after that has ended. Nothing here is
-- needed for requests to go on.

local checks = require "tidegate.checks"
local codec = require "tidegate.codec"
local ffi = require "ffi"
local metrics = require "tidegate.metrics"
local policies = require "tidegate.policy"
local records = require "tidegate.records"
local store = require "tidegate.store"

local ceil = math.ceil
local exiting = ngx.worker.exiting
local ffi_string = ffi.string
local floor = math.floor
local ipairs = ipairs
local max = math.max
local min = math.min
local next = next
local ngx = ngx
local now = ngx.now
local pairs = pairs
local pcall = pcall
local sleep = ngx.sleep
local tcp = ngx.socket.tcp
local timer_at = ngx.timer.at

-- Probes that may begin in one go; those of a usual update all do. One takes some 50 us.
local BURST = 16
local RATE = 4000           -- and after that, a second
local MAX_RUNNING = 128     -- under way at a time
local MAX_RETRYING = 64     -- of these, of peers that have failed before
local TURN = 0.001          -- seconds
local EFFORT = 500          -- records that are looked at per turn
local OPENING = 10          -- what opening an upstream counts beside its records
local CONNECT_TIMEOUT = 1000    -- ms
-- Between attempts: a twentieth of the time since the push, within limits, so that a peer is found
-- soon after it listens, in proportion to what it took to get there.
local PAUSE_SHARE = 0.05
local MIN_PAUSE = 0.02
local MAX_PAUSE = 0.25
local LATE = 60                 -- seconds after which it is only looked for once a second
local LATE_PAUSE = 1
local IMPATIENCE = 3        -- peers of an upstream without any other that may fail in a row at once
local SHARES = 64           -- turns in which a large upstream is gone through
local SHARE = 16            -- peers per turn, where others serve meanwhile
local GATHER = 0.001        -- seconds in which peers come together that are admitted in one go
local SPACING = 20e-6       -- seconds per peer of the upstream between such, and between passes
local SLOT = 0.01           -- seconds; sleeping upstreams are kept in slots of that length
local MANY = 256            -- upstreams of a push after which others get their turn
local MAX_STEP = 2          -- seconds that the clock may seem to have gone on at once

local BARE, FRESH, RETRY = 1, 2, 3

local _M = {}

local states = {}       -- upstream → what is kept of it, see `begin`
local queues = {}       -- those whose turn is to come, by rank
local slots = {}        -- number of a slot → those that sleep until then
local sleepers = 0
local slot = 0          -- the last one that was woken
local busy = {}         -- key of a peer → true, until it has failed or is admitted
local accepted = {}     -- upstream → jobs whose peers are to be admitted in one go
local running, retrying = 0, 0
local tokens, effort = BURST, EFFORT
local clock, looked_at = 0, nil     -- seconds; not the clock's time, which may be set
local armed             -- when the next turn comes
local opened = {}       -- the upstream that was looked at last


local function clear()
    states, slots, sleepers, opened = {}, {}, 0, {}
    for rank = BARE, RETRY do
        queues[rank] = { first = 1, last = 0 }
    end
end


clear()


local function begin(name)
    local state = {
        name = name,
        queue = nil,        -- rank of the queue it is in
        wake = nil,         -- when it is to be woken
        bare = true,        -- no peer of it is admitted, as far as is known
        hurried = false,    -- requests wait for it
        retry = false,      -- whether this pass is about peers that have failed, too
        number = nil,       -- the version that the pass is through
        at = 0,             -- place in it
        left = nil,         -- what is left of its turn
        earliest = nil,     -- when the first of those is due that have failed
        tried = nil,        -- key of a peer that has failed → when it is due
        failures = 0,       -- how many these are
        count = 0,          -- peers to be probed, and all
        peers = 0,
        since = clock,
        admit_at = 0,       -- when peers may be admitted again
    }
    states[name] = state
    return state
end


local function put(state, rank, first)
    if state.queue == rank and not first then
        return
    end
    state.queue, state.wake = rank, nil
    local queue = queues[rank]
    if first then
        queue.first = queue.first - 1
        queue[queue.first] = state
    else
        queue.last = queue.last + 1
        queue[queue.last] = state
    end
end


local function is_empty(rank)
    return queues[rank].first > queues[rank].last
end


local function take(rank)
    local queue = queues[rank]
    while queue.first <= queue.last do
        local state = queue[queue.first]
        queue[queue.first] = nil
        queue.first = queue.first + 1
        -- It may have changed queues since.
        if state.queue == rank and states[state.name] == state then
            state.queue = nil
            return state
        end
    end
    queue.first, queue.last = 1, 0
    return nil
end


local function rank_of(state)
    return (state.hurried or state.bare and not state.retry) and BARE
        or state.retry and RETRY or FRESH
end


local function sleep_until(state, at)
    if state.queue or state.wake and state.wake <= at then
        return
    end
    local number = max(ceil(at / SLOT), slot + 1)
    local list = slots[number]
    if not list then
        list = {}
        slots[number] = list
    end
    state.wake = number * SLOT
    list[#list + 1] = state
    sleepers = sleepers + 1
end


local function wake()
    local last = floor(clock / SLOT)
    for number = slot + 1, last do
        for _, state in ipairs(slots[number] or {}) do
            sleepers = sleepers - 1
            if state.wake == number * SLOT and states[state.name] == state then
                state.retry = true
                put(state, rank_of(state))
            end
        end
        slots[number] = nil
    end
    slot = last
end


local function drop(state)
    states[state.name] = nil
    store.disclaim(state.name)
end


-- Leaves all to other workers.
local function give_up()
    for name in pairs(states) do
        store.disclaim(name)
    end
    clear()
end


local function open(name)
    local number = store.number(name)
    if opened.name ~= name or opened.number ~= number then
        local blob
        blob, number = store.get(name)
        local head = blob and codec.head(blob)
        opened = { name = name, number = number, blob = blob, head = head }
        if head and head.probing > 0 then
            local check = policies.parse(codec.policy(blob, head)).check
            opened.check = check and check.kind == "http" and check
            opened.peers = codec.peers(blob)
        end
        effort = effort - OPENING - (blob and #blob / 4096 or 0)
    end
    return opened
end


-- The next peer of this pass that is not in hand.
local function find(state, view)
    local head = view.head
    local first = head.up + head.draining
    while state.at < head.probing and effort > 0 do
        local index = first + state.at
        local record = view.peers[index]
        state.at = state.at + 1
        effort = effort - 1
        local bytes = ffi_string(record.address, record.family == 6 and 16 or 4)
        local id = codec.id(view.blob, head.count, index)
        local key = state.name .. "\1" .. id .. "\1" .. bytes .. record.port
        if not busy[key] then
            local due = state.tried and state.tried[key]
            if not due or state.retry and due <= clock then
                return {
                    name = state.name,
                    key = key,
                    peer = { id = id, family = record.family, bytes = bytes, port = record.port },
                    check = view.check,
                    again = due ~= nil,
                }
            end
            state.earliest = min(state.earliest or due, due)
        end
    end
    return nil
end


-- All that is left of it is under way, or has failed and waits.
local function end_pass(state, view)
    local due = state.earliest
    state.at, state.left, state.earliest = 0, nil, nil
    if due then
        sleep_until(state, max(due, clock + view.head.probing * SPACING))
    end
end


-- Takes up upstream `state`, which was in the queue of `rank`; gives a peer to be probed.
local function take_up(state, rank)
    if not store.claim(state.name) then
        states[state.name] = nil
        return nil
    end
    local view = open(state.name)
    local head = view.head
    if not head or head.probing == 0 then
        drop(state)
        return nil
    end
    if state.number ~= view.number then
        state.number, state.at, state.earliest = view.number, 0, nil
        state.bare, state.count, state.peers = head.up == 0, head.probing, head.count
        if state.failures > head.probing then
            -- Most of those that are remembered are not there any more.
            state.tried, state.failures = nil, 0
        end
    end
    if rank_of(state) > rank then
        put(state, rank_of(state))
        return nil
    end
    local job = find(state, view)
    if job then
        state.left = (state.left or max(rank == FRESH and SHARE or 1,
                                        ceil(head.probing / SHARES))) - 1
        put(state, rank, state.left > 0)
        state.left = state.left > 0 and state.left or nil
    elseif state.at < head.probing then
        put(state, rank, true)
    else
        end_pass(state, view)
    end
    return job
end


local function next_job()
    while effort > 0 do
        local rank = BARE
        local state = take(BARE)
        if not state then
            rank, state = FRESH, take(FRESH)
        end
        if not state and retrying < MAX_RETRYING then
            rank, state = RETRY, take(RETRY)
        end
        if not state then
            return nil
        end
        local job = take_up(state, rank)
        if job then
            return job
        end
    end
    return nil
end


-- Brings the clock up to date, and what may be done in this turn.
local function look_at_clock()
    local at = now()
    local passed = min(max(at - (looked_at or at), 0), MAX_STEP)
    looked_at = at
    clock = clock + passed
    tokens = min(BURST, tokens + passed * RATE)
    effort = min(EFFORT, effort + passed / TURN * EFFORT)
end


local turn, attempt


-- Sees to the next turn: soon while there is work that may be begun, else when a sleeper wakes.
-- Should nginx have no timer to spare, the next second's `start_all` goes on.
local function arm()
    local delay
    if running < MAX_RUNNING and (not is_empty(BARE) or not is_empty(FRESH)
                                  or retrying < MAX_RETRYING and not is_empty(RETRY)) then
        delay = TURN
    elseif sleepers > 0 then
        local number = slot + 1
        while not slots[number] and number < slot + 1 / SLOT do
            number = number + 1
        end
        delay = max(number * SLOT - clock, TURN)
    end
    local due = delay and clock + delay
    if due and not (armed and armed > clock and armed <= due) and timer_at(delay, turn, due) then
        armed = due
    end
end


-- Begins as many probes as may begin now.
local function go_on()
    if exiting() then
        return give_up()
    end
    look_at_clock()
    wake()
    while tokens >= 1 and running < MAX_RUNNING do
        local job = next_job()
        if not job or not timer_at(0, attempt, job) then
            break
        end
        busy[job.key] = true
        tokens = tokens - 1
        running = running + 1
        retrying = retrying + (job.again and 1 or 0)
    end
    if not next(states) then
        opened = {}
    end
    arm()
end


function turn(premature, due)
    if armed == due then
        armed = nil
    end
    if premature then
        return give_up()
    end
    go_on()
end


local function passes(job)
    local result = checks.once(job.name, job.check, job.peer)
    metrics.add(job.name, result.ok and metrics.CHECKS_OK or metrics.CHECKS_FAILED)
    if not result.ok then
        records.refused(job.name, job.peer, result.message)
    end
    return result.ok
end


local function accepts(job)
    if job.check then
        return passes(job)
    end
    local socket, peer = tcp(), job.peer
    socket:settimeout(CONNECT_TIMEOUT)
    local ok = socket:connect(codec.host(peer.family, peer.bytes), peer.port)
    socket:close()
    return ok
end


local function pause(state)
    local waited = clock - state.since
    return waited > LATE and LATE_PAUSE or min(max(waited * PAUSE_SHARE, MIN_PAUSE), MAX_PAUSE)
end


local function note_failure(job)
    busy[job.key] = nil
    local state = states[job.name]
    if not state then
        return
    end
    local due = max(clock + pause(state), clock + state.count * SPACING)
    state.tried = state.tried or {}
    if not state.tried[job.key] then
        state.failures = state.failures + 1
    end
    state.tried[job.key] = due
    if not state.queue then
        sleep_until(state, due)
        return
    end
    state.earliest = min(state.earliest or due, due)
    if state.queue == BARE and state.failures <= IMPATIENCE then
        put(state, BARE, true)
    end
end


-- Admits what has come together of upstream `name`.
local function admit(name)
    local jobs = accepted[name]
    accepted[name] = nil
    local peers = {}
    for index, job in ipairs(jobs) do
        peers[index] = job.peer
    end
    local ok, done = pcall(store.admit, name, peers)
    if not ok then
        ngx.log(ngx.ERR, "tidegate: probe of upstream ", name, ": ", done)
    end
    look_at_clock()
    local state = states[name]
    if state then
        state.admit_at = clock + state.peers * SPACING
    end
    for _, job in ipairs(jobs) do
        if not (ok and done) then
            note_failure(job)
        else
            busy[job.key] = nil
            if state and state.tried and state.tried[job.key] then
                state.tried[job.key] = nil
                state.failures = state.failures - 1
            end
        end
    end
    if state and not state.queue and not state.wake then
        put(state, rank_of(state))
    end
    go_on()
end


function attempt(premature, job)
    if premature then
        return give_up()
    end
    local ok, result = pcall(accepts, job)
    if not ok then
        ngx.log(ngx.ERR, "tidegate: probe of upstream ", job.name, ": ", result)
    end
    running = running - 1
    retrying = retrying - (job.again and 1 or 0)
    look_at_clock()
    if not ok or not result then
        note_failure(job)
        return go_on()
    end
    local list = accepted[job.name]
    if list then
        list[#list + 1] = job
        return go_on()
    end
    accepted[job.name] = { job }
    go_on()
    local state = states[job.name]
    sleep(max(GATHER, state and state.admit_at - clock or 0))
    admit(job.name)
end


--- Begins with peers of the upstreams `names`, which a push has brought.
function _M.start(names)
    look_at_clock()
    for index, name in ipairs(names) do
        local state = states[name] or begin(name)
        state.since, state.number, state.retry, state.hurried = clock, nil, false, false
        put(state, rank_of(state))
        if index % MANY == 0 then
            store.breathe()
        end
    end
    go_on()
end


--- Has upstream `name` come first, since requests wait for a peer of it.
function _M.hurry(name)
    local state = states[name] or begin(name)
    state.hurried = true
    if not state.wake then
        put(state, BARE, true)
    end
    go_on()
end


--- Begins with all that nobody has in hand, such as what a worker that died has left; called each
-- second.
function _M.start_all()
    if is_empty(BARE) and is_empty(FRESH) then
        for _, name in ipairs(store.probing_names()) do
            local state = states[name] or begin(name)
            if not state.queue and not state.wake then
                put(state, rank_of(state))
            end
            store.breathe()
        end
    end
    go_on()
end


return _M
