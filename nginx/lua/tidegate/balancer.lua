--- Picks the peer for a request: all that Tidegate does on the path of every request.
--
-- Why: one read of the upstream's name, one of its version number; all else is this worker's own
-- memory until that number changes. Which peer it is says `tidegate.selection`, which ones can be
-- sent to `tidegate.health`. Nothing here waits; a request that finds no peer fails over to
-- `tidegate.hold`.

local balancer = require "ngx.balancer"
local codec = require "tidegate.codec"
local health = require "tidegate.health"
local metrics = require "tidegate.metrics"
local peers = require "tidegate.peers"
local policies = require "tidegate.policy"
local selection = require "tidegate.selection"
local store = require "tidegate.store"

local ptr = ngx.shared.tidegate_ptr

local begin = metrics.begin
local exit = ngx.exit
local get_last_failure = balancer.get_last_failure
local host_of = peers.host
local min = math.min
local pairs = pairs
local quiet = health.quiet
local select_peer = selection.select
local set_current_peer = balancer.set_current_peer
local set_more_tries = balancer.set_more_tries
local var = ngx.var

local ERROR = ngx.ERROR
local MAX_TRIES = 5

local _M = {}

local known = {}            -- upstream name → what this worker has made of its version


-- What the worker needs of a version; `blob` keeps the records alive.
local function open(name, blob, number, before)
    local head = codec.head(blob)
    local candidates = head.up + head.draining
    if head.hold == 0 then
        candidates = candidates + head.probing
    end
    local tries = min(candidates, MAX_TRIES)
    local upstream = {
        name = name,
        number = number,
        blob = blob,
        peers = codec.peers(blob),
        up = head.up,
        draining = head.draining,
        probing = head.probing,
        hold = head.hold,
        uniform = head.uniform == 1,
        total_weight = head.total_weight,
        policy = policies.parse(codec.policy(blob, head)),
        tries = tries > 1 and tries,
        hosts = {},
        stats = metrics.of(name),
    }
    selection.open(upstream, before)
    health.open(upstream, before)
    return upstream
end


local function refresh(name, before)
    local blob, number = store.get(name)
    local upstream = blob and open(name, blob, number, before)
    known[name] = upstream
    return upstream
end


--- Upstream `name` as it is now; nil where there is none.
local function lookup(name)
    local number = ptr:get(name)
    local upstream = known[name]
    if upstream and upstream.number == number then
        return upstream
    end
    return refresh(name, upstream)
end


_M.lookup = lookup


--- Forgets upstreams that are gone.
function _M.sweep()
    for name in pairs(known) do
        if not store.number(name) then
            known[name] = nil
        end
    end
end


--- Body of `balancer_by_lua`.
function _M.balance()
    local name = var.tidegate_upstream
    local upstream = lookup(name)
    local failure = get_last_failure()
    local index
    if failure then
        local tried = health.note_failure(name)
        index = upstream and select_peer(upstream, tried)
        if not index then
            return exit(ERROR)
        end
        metrics.add(name, metrics.RETRIES)
    else
        if upstream then
            if upstream.up > 0 and quiet() then
                index = upstream.picker:next()
            else
                index = select_peer(upstream)
            end
            begin(upstream.stats)
        end
        if not index then
            -- Debian's build has no way to answer 503 from here; `hold` sorts it out.
            var.tidegate_no_peer = "1"
            return exit(ERROR)
        end
        if upstream.tries then
            set_more_tries(upstream.tries)
        end
    end
    local ok, err = set_current_peer(upstream.hosts[index] or host_of(upstream, index),
                                     upstream.peers[index].port)
    if not ok then
        ngx.log(ngx.ERR, "tidegate: upstream ", name, ": ", err)
        return exit(ERROR)
    end
end


--- Body of `log_by_lua`: takes note of the end of a request.
function _M.log()
    metrics.log()
end


return _M
